"""The private corners of torch that piecework uses, each with a probe and a way to do without."""

# ruff: noqa: F403

from piecework.runtime.torch_compat.code.artifact import *
from piecework.runtime.torch_compat.code.inductor import *
from piecework.runtime.torch_compat.code.saved_code import *
from piecework.runtime.torch_compat.dictionaries import *
from piecework.runtime.torch_compat.distributed import *
from piecework.runtime.torch_compat.kernel_marks import *
from piecework.runtime.torch_compat.operators import *
from piecework.runtime.torch_compat.switches import *
from piecework.runtime.torch_compat.tensors import *
from piecework.runtime.torch_compat.trace.dynamo import *
from piecework.runtime.torch_compat.trace.guards import *
from piecework.runtime.torch_compat.trace.regions import *
from piecework.runtime.torch_compat.trace.shape_record import *
from piecework.runtime.torch_compat.trace.shapes import *
from piecework.runtime.torch_compat.trace.side_effects import *
from piecework.runtime.torch_compat.trees import *
