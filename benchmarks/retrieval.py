"""Time of one per-user search, against numpy on the user's slice and against a search of everything.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/retrieval.py [--dim 1536]

Every user has 150 memories; a query asks for the nearest one other than its own. Peers:
    numpy slice     keys of the user @ query, own row masked, argmax: the least work that is right
    FAISS range     the bare range search that MemoryIndex is built on, without its tie rule
    FAISS whole     search all users' memories for 1,000 and keep the user's own: what a plain vector
                    store does
`equal` counts answers that are numpy's, `answered` queries that found any memory of the user.

Measured 2026-11-20 with OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 on a 2-core AMD EPYC that other work
shared (load 4), Python 3.11, numpy 2.4.6, faiss-cpu 1.15.1; us/query (ratio to the numpy slice):
                    dim 64           dim 1536
    numpy slice      3.0  (1.00)       79.8  (1.00)
    MemoryIndex     45.5 (15.43)      106.4  (1.33)    equal to numpy on 2000/2000 queries
    FAISS range     19.0  (6.44)       58.9  (0.74)
    FAISS whole    601.5   (204)    11247.6   (141)
At dim 64 a search costs what its Python calls cost: 24,000 samples take about a second.
"""

import argparse
import time
from collections.abc import Callable

import faiss
import numpy as np
from numpy.typing import NDArray

from personas_tune.embedding.vectors import Embeddings, Space
from personas_tune.retrieval.index import MemoryIndex, build_index

N_USERS, N_MEMORIES = 200, 150
Search = Callable[[int, int, NDArray[np.float32]], int | None]  # user, own position, query -> position


def random_unit_rows(n_rows: int, dim: int, seed: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((n_rows, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def memory_index(keys: NDArray[np.float32]) -> MemoryIndex:
    rows = range(len(keys))
    user_ids = [f"{row // N_MEMORIES:03}" for row in rows]
    space = Space("random", keys.shape[1], "")
    return build_index(user_ids, [row % N_MEMORIES for row in rows], Embeddings(keys, space))


def ours(index: MemoryIndex) -> Search:
    def search(user: int, own: int, query: NDArray[np.float32]) -> int | None:
        return index.nearest(f"{user:03}", query, 1, own_position=own)[0]

    return search


def numpy_slice(keys: NDArray[np.float32]) -> Search:
    def search(user: int, own: int, query: NDArray[np.float32]) -> int | None:
        scores = keys[user * N_MEMORIES : (user + 1) * N_MEMORIES] @ query
        scores[own] = -2
        return int(scores.argmax())

    return search


def faiss_range(whole: faiss.IndexFlatIP) -> Search:
    def search(user: int, own: int, query: NDArray[np.float32]) -> int | None:
        selector = faiss.IDSelectorRange(user * N_MEMORIES, (user + 1) * N_MEMORIES)
        _, rows = whole.search(query[None], 2, params=faiss.SearchParameters(sel=selector))
        first, second = (rows[0] - user * N_MEMORIES).tolist()
        return second if first == own else first

    return search


def faiss_whole(whole: faiss.IndexFlatIP, n_found: int = 1000) -> Search:
    def search(user: int, own: int, query: NDArray[np.float32]) -> int | None:
        _, rows = whole.search(query[None], n_found)
        found = rows[0][rows[0] // N_MEMORIES == user] - user * N_MEMORIES
        found = found[found != own]
        return int(found[0]) if len(found) else None

    return search


def time_search(search: Search, queries: NDArray[np.float32], n_queries: int) -> tuple[float, list[int | None]]:
    """Microseconds a query, and the answers; the best of three rounds."""
    best, answers = float("inf"), []
    for _ in range(3):
        start = time.perf_counter()
        answers = [search(row % N_USERS, row % N_MEMORIES, queries[row]) for row in range(n_queries)]
        best = min(best, (time.perf_counter() - start) / n_queries * 1e6)
    return best, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, nargs="*", default=[64, 1536])
    for dim in parser.parse_args().dim:
        compare(dim)


def compare(dim: int) -> None:
    keys, queries = random_unit_rows(N_USERS * N_MEMORIES, dim, seed=0), random_unit_rows(2000, dim, seed=1)
    faiss.omp_set_num_threads(1)
    whole = faiss.IndexFlatIP(dim)
    whole.add(keys)
    peer_time, peer_answers = time_search(numpy_slice(keys), queries, 2000)
    print(f"{N_USERS} users x {N_MEMORIES} memories, dim {dim}, us/query (ratio to the numpy slice)")
    print(f"  numpy slice   {peer_time:9.1f}  (1.00)")
    for name, search, n_queries in (
        ("MemoryIndex", ours(memory_index(keys)), 2000),
        ("FAISS range", faiss_range(whole), 2000),
        ("FAISS whole", faiss_whole(whole), 100),
    ):
        taken, answers = time_search(search, queries, n_queries)
        equal = sum(a == b for a, b in zip(answers, peer_answers, strict=False))
        answered = sum(answer is not None for answer in answers)
        print(
            f"  {name}   {taken:9.1f}  ({taken / peer_time:.2f})  "
            f"equal {equal}/{n_queries}, answered {answered / n_queries:.0%}"
        )


if __name__ == "__main__":
    main()
