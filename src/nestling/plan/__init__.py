"""What a distillation would take on machines that are not at hand: memory, sharding, time; all on paper."""

from nestling.plan.devices import DEVICES, Device, Machines
from nestling.plan.memory import Figures, Memory
from nestling.plan.plan import Job, Plan, plan

__all__ = ["DEVICES", "Device", "Figures", "Job", "Machines", "Memory", "Plan", "plan"]
