"""How the members of a sweep become processes: commands of their own, each with its devices.

Nothing here imports torch before it must: a launcher starts many processes that only wait.
"""

from launching.members import MemberError, run_member

__all__ = ["MemberError", "run_member"]
