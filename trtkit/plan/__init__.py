"""What fits on a GPU and how fast it should decode: pure arithmetic, no GPU and no torch needed.

``memory`` (what fits), ``speed`` (the roofline and its fitted constants), ``refusals`` (what no build would take),
``rows`` (the table of ``trtkit plan``), ``published`` (the measurements that the constants are fitted to), ``recipes``
(the table's lines as build recipes).
"""

from trtkit.plan.memory import DraftPlan, MemoryPlan, Workload, default_draft, memory_plan
from trtkit.plan.refusals import check_precision
from trtkit.plan.rows import PlanRow, plan_rows
from trtkit.plan.speed import step_bytes

__all__ = ["DraftPlan", "MemoryPlan", "PlanRow", "Workload", "check_precision", "default_draft", "memory_plan",
           "plan_rows", "step_bytes"]  # fmt: skip
