"""What a user's configuration of Jupyter cannot take from the server of ``i2v-lab lab``: that it asks for a token."""

from __future__ import annotations

import secrets
from typing import Any

from jupyter_server.auth.identity import PasswordIdentityProvider
from traitlets import validate

from i2v_lab.cli.output import log


class RequiredToken(PasswordIdentityProvider):
    """Asks for a token, or for the password where one is configured; generates a token where an empty one is.

    Whoever can reach the port of a server without a token can run code as the user: other users of the machine, and
    pages in the user's browser.
    """

    @validate("token")
    def _never_empty(self, proposal: dict[str, Any]) -> str:
        token = str(proposal["value"])
        if token.strip() or self.hashed_password:
            return token
        log("i2v-lab: Jupyter's configuration sets an empty token; this server has one of its own instead")
        self.token_generated = True  # so that it is part of the address that is printed
        return secrets.token_hex(24)
