"""Where the teacher runs when one process is not enough: processes of this machine, or actors of Ray.

`messages` stands at the bottom; `processes` and `actors` import it, `engine` imports all three.
"""
