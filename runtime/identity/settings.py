"""What around a compilation decides its result. In: nothing. Out: torch's settings and options of this process as named texts for the cache's key.

It changes nothing, and it leaves out nothing that it can't tell: such a thing is an error.
"""

from __future__ import annotations

from piecework.runtime.identity.values import canonical, digest_of, text_of
from piecework.runtime.torch_compat.settings import global_passes, torch_options, torch_settings


def settings_factors(*, every: bool = True) -> dict[str, str]:
    """Setting → value as text: ambient modes, torch's switches and configurations, and code that was put into them.

    Args:
        every: see `piecework.runtime.torch_compat.settings.torch_options`.

    Raises:
        Unidentifiable: an option, a pass or a lowering that somebody set has no stable form.
    """
    options, changed = torch_options(every=every)
    found = {name: _text(value, f"torch's {name}") for name, value in torch_settings().items()}
    found |= {name: _text(value, f"torch.{name}") for name, value in changed.items()}
    found["torch's options"] = digest_of(sorted(options.items()), "torch's options")
    return found | {
        name: digest_of(each, f"torch.{name}") for name, each in global_passes(every=every).items()
    }


def _text(value: object, where: str) -> str:
    return text_of(canonical(value, where))
