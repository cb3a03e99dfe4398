"""What the exit code of a training program says, so that a scheduler or a shell loop can decide what to do next.

0   done           the run reached its last step, or had reached it before
1   crashed        a bug: the traceback is on stderr
2   bad input      a setting, file or checkpoint that cannot be used as it is: one line on stderr
3   diverged       stopped by a check of its own (KL): go on with `--recovery_mode`
4   unrecoverable  attempts exhausted, or no checkpoint that verifies: a person must look
75  preempted      SIGTERM or SIGINT: saved at the end of a step; start again with `--auto_resume`
"""

DONE = 0
CRASHED = 1
BAD_INPUT = 2
DIVERGED = 3
UNRECOVERABLE = 4
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
