"""Compiled kernels for CPUs: products, a whole decoder step and the draw of stage one; what stage two learns with.

They are optional. ``kernels()`` is None where they cannot be built (``why_not`` says why), and everything runs on
PyTorch's own operations, which are the slow twin in the tests.
"""

from esrl.kernels.native import LaidOut as LaidOut
from esrl.kernels.native import Native as Native
from esrl.kernels.native import kernels as kernels
from esrl.kernels.native import operations as operations
from esrl.kernels.native import why_not as why_not
