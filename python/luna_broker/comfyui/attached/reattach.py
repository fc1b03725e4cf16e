"""What becomes of attached weights whose broker went away: they stay, and a new broker's take their place."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from luna_broker import LunaBrokerError, Weights

_LOG = logging.getLogger("luna_broker")


class Renewal:
    """Keeps weights counted as held. To be asked before they are computed with, when nothing else uses them."""

    def __init__(self, weights: Sequence[Weights]) -> None:
        self.weights = tuple(weights)
        # Said once, not before every picture.
        self._was_told = False

    def renew(self) -> bool:
        """Whether the broker counts the weights as held, after it was asked to where it did not.

        A restarted broker loads the same file, and its memory comes to lie at the addresses of the old. Where there is
        no broker, or the file is another one by now, host memory stays: what is computed with it is right. Memory of a
        GPU may be gone with its broker, so that `LunaBrokerError` is raised then.
        """
        held = [self._renew(each) for each in self.weights]
        return all(held)

    def _renew(self, weights: Weights) -> bool:
        try:
            weights.check()
            return True
        except LunaBrokerError:
            pass
        try:
            weights.reattach(progress=False)
        except LunaBrokerError as error:
            if weights.device != "cpu":
                raise
            if not self._was_told:
                _LOG.warning("luna-broker: %s goes on with the memory that it has: %s", weights.name, error)
            self._was_told = True
            return False
        self._was_told = False
        _LOG.info("luna-broker: %s is attached again, at the same addresses", weights.name)
        return True
