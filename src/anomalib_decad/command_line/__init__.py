# SPDX-License-Identifier: Apache-2.0
"""anomalib's command line as users of this package's models meet it: quiet, and with errors of one line.

Commands with other models stay as they are. All of it imports the standard library only.
"""

from anomalib_decad.command_line.arguments import names_model
from anomalib_decad.command_line.run import extend

__all__ = ["extend", "names_model"]
