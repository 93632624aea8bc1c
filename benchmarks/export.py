"""What it takes to export an adapter of rank 256 on q and k of Phi-3-Mini's layers, beside PEFT's own merge.

Hardware: 2 cores of an AMD EPYC that other work shared, hence CPU time; torch 2.13 (CPU), Python 3.11, PEFT 0.18.1
Date:     2026-11-20
Command:  OMP_NUM_THREADS=1 python benchmarks/export.py --layers 4
Result:   4 layers, 1.30 GB:
            a PEFT folder                                 4.5 s of CPU time  peak 0.60 GB
            a PEFT folder, cut from rank 512 to 256       7.0 s of CPU time  peak 0.81 GB
            a merged checkpoint                          13.7 s of CPU time  peak 2.30 GB
            PEFT's merge_and_unload, save_pretrained     11.9 s of CPU time  peak 1.80 GB
            merging takes 1.15 of PEFT's CPU time, 1.28 of its memory; greatest difference 0.0e+00

The base is random, in bf16 and in two files, with Phi-3-Mini's widths and vocabulary. Each way runs in a process of its
own, whose CPU time and peak resident memory are printed, Python and the imports of torch and of the libraries included;
mapped pages of the files that are read count, too. The peer loads base and PEFT folder with transformers and PEFT, in
bf16, calls `merge_and_unload` and saves.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from prepare import measure
from safetensors.torch import save_file

EMBED, HIDDEN, VOCAB, RANK = 3072, 8192, 32064, 256
WAYS = {
    "peft": "a PEFT folder",
    "cut": "a PEFT folder, cut from rank 512 to 256",
    "merged": "a merged checkpoint",
    "theirs": "PEFT's merge_and_unload, save_pretrained",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--way", choices=["base", *WAYS], help="run one way on a folder that is there already")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.way == "base":
        write_base(asked.layers, asked.folder / "base")
        write_trained(asked.layers, asked.folder / "persona" / "0")
    elif asked.way == "theirs":
        merge_by_peft(asked.folder)
    elif asked.way is not None:
        export(asked.folder, asked.way)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(asked.layers, Path(folder))


def compare(n_layers: int, folder: Path) -> None:
    run = [sys.executable, __file__, "--layers", str(n_layers), "--folder", str(folder), "--way"]
    measure([*run, "base"])  # not here: a process's peak counts what its parent held
    size = sum(path.stat().st_size for path in (folder / "base").iterdir()) / 1e9
    print(f"{n_layers} layers, {size:.2f} GB:")
    taken = {}
    for way, label in WAYS.items():
        taken[way] = measure([*run, way])
        print(
            f"  {label:42} {taken[way].cpu_seconds:6.1f} s of CPU time  peak {taken[way].gigabytes:.2f} GB", flush=True
        )
    ours, theirs = taken["merged"], taken["theirs"]
    print(
        f"  merging takes {ours.cpu_seconds / theirs.cpu_seconds:.2f} of PEFT's CPU time, "
        f"{ours.gigabytes / theirs.gigabytes:.2f} of its memory; greatest difference {difference(folder):.1e}"
    )


def write_base(n_layers: int, folder: Path) -> None:
    shapes = {"model.embed_tokens": (VOCAB, EMBED), "model.norm": (EMBED,), "lm_head": (VOCAB, EMBED)}
    for layer in range(n_layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "self_attn.qkv_proj": (3 * EMBED, EMBED), "self_attn.o_proj": (EMBED, EMBED),
                "mlp.gate_up_proj": (2 * HIDDEN, EMBED), "mlp.down_proj": (EMBED, HIDDEN),
                "input_layernorm": (EMBED,), "post_attention_layernorm": (EMBED,),
            }.items()
        }  # fmt: skip
    config = {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": EMBED, "intermediate_size": HIDDEN,
        "num_hidden_layers": n_layers, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": VOCAB,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "pad_token_id": 0,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = {f"{name}.weight": torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)}
    for place in sorted(set(places.values())):
        held = {name: weight for name, weight in weights.items() if places[name] == place}
        save_file(held, folder / place, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_trained(n_layers: int, folder: Path) -> None:
    """An adapter as training leaves it."""
    from personas_tune.adapters.files import NATIVE_FILE, save_native

    weights = {
        f"layers.{layer}.attn.{module}.lora_{half}.weight": torch.randn(shape) * 0.02
        for layer in range(n_layers)
        for module in ("q_proj", "k_proj")
        for half, shape in {"a": (RANK, EMBED), "b": (EMBED, RANK)}.items()
    }
    folder.mkdir(parents=True)
    save_native(folder / NATIVE_FILE, weights, {"rank": RANK, "alpha": 32, "dropout": 0.1})


def export(folder: Path, way: str) -> None:
    from personas_tune.adapters.layouts import read_layout
    from personas_tune.export.facts import Facts
    from personas_tune.export.origin import find_origin
    from personas_tune.export.writing import Form, write_adapter

    base = folder / "base"
    form = Form("merged" if way == "merged" else "peft", None, 256 if way == "cut" else None, None)
    origin = find_origin({}, {"checkpoint_dir": str(base)})
    files = sorted(base.glob("*.safetensors")) if way == "merged" else []
    layout = read_layout("PHI3_MINI", base)
    write_adapter(folder / way, folder / "persona" / "0", form, origin, layout, Facts({}), files)


def merge_by_peft(folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, folder / "peft").merge_and_unload().save_pretrained(folder / "theirs")


def difference(folder: Path) -> float:
    """Greatest difference between a weight that we merged and PEFT's."""
    from personas_tune.adapters.base_weights import weight_reader

    ours, theirs = (weight_reader(sorted((folder / way).glob("*.safetensors"))) for way in ("merged", "theirs"))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    return (ours(name).float() - theirs(name).float()).abs().max().item()


if __name__ == "__main__":
    main()
