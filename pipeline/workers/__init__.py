"""Worker pools for the teacher: processes of this machine, or actors of a Ray cluster.

`messages` stands at the bottom; `processes` and `actors` import it, `engine` imports all three.
"""
