"""The commands of `dora-export`, one in a file.

Each has `add`, which describes the command to argparse and sets as defaults: `run`, from the options to the exit code;
where there is something to say, `misused`, from the options to what is wrong with them together or None, and
`when_interrupted`, from the options to the sentence for Ctrl-C. Heavy imports are inside `run`.
"""
