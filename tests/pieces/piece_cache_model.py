"""A small model compiled through the cache, in a process of its own. In: a configuration, or orders on standard input. Out: JSON lines.

As a script it compiles once. With ``--serve`` it imports everything and then forks one process per order, so that a test can start,
and kill, a hundred of them without a hundred imports; nothing is compiled before the fork.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import piecework


@piecework.splitting_op("piece_cache::mix", mutates_args=("out",))
def mix(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, layer: str) -> None:
    out.copy_(left - right)


class Block(torch.nn.Module):
    def __init__(self, index: int, width: int) -> None:
        super().__init__()
        self.index = index
        self.enter, self.leave = torch.nn.Linear(width, 2 * width), torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.enter(x).chunk(2, -1)
        out = torch.empty_like(left)
        mix(left, right, out, f"layers.{self.index}")
        return x + self.leave(out)


def compile_and_compare(width: int, **fields: object) -> dict[str, object]:
    """Compile the model of this width and compare it with eager, on a batch size that it was not traced with."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block(i, width) for i in range(4)))
    config = piecework.CompilationConfig(**fields)
    stitched = piecework.compile(model, (torch.randn(5, width),), config=config)
    x = torch.randn(3, width)
    with torch.no_grad():
        error = (stitched(x) - model(x)).abs().max().item()
    return {**piecework.counters.snapshot(), "error": error, "code": stitched.source.code}


def serve() -> None:
    """Per order ``{"cache": folder, "width": n, "out": file}``: fork, print the process's id, wait, print how it ended."""
    import torch._dynamo.convert_frame
    import torch._inductor.compile_fx
    import torch._inductor.standalone_compile

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _obey(order)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _obey(order: dict[str, str]) -> None:
    """The life of a forked process; it never returns."""
    code = 1
    try:
        os.setsid()  # so that the C++ compiler that it starts can be killed with it
        os.environ["PIECEWORK_CACHE_DIR"] = order["cache"]
        out = Path(order["out"])
        with out.with_suffix(".log").open("w") as log:
            os.dup2(log.fileno(), sys.stderr.fileno())
            result = compile_and_compare(int(order["width"]))
            sys.stderr.flush()
        out.write_text(json.dumps(result))
        code = 0
    except BaseException:  # noqa: BLE001 - the test reads it in the log
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if sys.argv[1] == "--serve":
        serve()
    else:
        print(json.dumps(compile_and_compare(8, **json.loads(sys.argv[1]))))
