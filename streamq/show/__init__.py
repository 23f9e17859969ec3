"""What people read in a terminal, and the same as JSON."""

from .batches import outcome_line, show_outcomes, show_plans
from .formats import formats_json, show_formats
from .losses import quality_json, quality_lines
from .plans import plan_json, plan_lines, show_plan, summary_json, summary_lines
from .sources import fused_groups, inspect_json, show_inspect

__all__ = [
    "formats_json", "fused_groups", "inspect_json", "outcome_line", "plan_json", "plan_lines",
    "quality_json", "quality_lines", "show_formats", "show_inspect", "show_outcomes", "show_plan",
    "show_plans", "summary_json", "summary_lines",
]  # fmt: skip
