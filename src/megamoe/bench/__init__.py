# SPDX-License-Identifier: Apache-2.0
"""How fast is it: operations against their ceilings, on the GPU at hand."""
