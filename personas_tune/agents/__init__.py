"""User agents that rate items: on a base in this process, or on a server that hosts the exported adapters."""

from personas_tune.agents.agent import Agent
from personas_tune.agents.local import load_agent
from personas_tune.agents.newcomers import NewUser
from personas_tune.agents.ratings import Ratings
from personas_tune.agents.served import load_served_agent
from personas_tune.prompts.render import ItemText

__all__ = ["Agent", "ItemText", "NewUser", "Ratings", "load_agent", "load_served_agent"]
