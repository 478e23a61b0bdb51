"""Runs the programs of the documentation in processes that have already loaded torch and moecomm."""

import contextlib
import io
import json
import os
import runpy
import sys
import traceback


def run(argv, folder, environment, out):
    """Run `python FILE ...`, `moecomm ...` or `blocks PAGE` in a folder. Output goes to the file `out`."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(out, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    import torch

    torch.set_num_threads(1)
    try:
        if argv[0] == "blocks":
            run_blocks(argv[1])
        elif argv[0] == "python":
            sys.argv = argv[1:]
            runpy.run_path(argv[1], run_name="__main__")
        else:
            from moecomm.__main__ import main

            sys.argv = argv
            sys.exit(main())
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_blocks(page):
    """Run the blocks in blocks.json in order; write the output of each to outputs.json."""
    outputs, names = [], {"__name__": "__main__"}
    with open("blocks.json") as file:
        blocks = json.load(file)
    for line, text in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * line + text, page, "exec"), names)
        outputs.append(out.getvalue())
    with open("outputs.json", "w") as file:
        json.dump(outputs, file)
