"""The compiled core: five-step wrappers (buffers, checks, one nogil call, exception, result) over csrc/.

It knows arrays and numbers, never paths.
"""

cimport numpy as cnp

cnp.import_array()
