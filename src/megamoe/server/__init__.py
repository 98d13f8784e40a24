# SPDX-License-Identifier: Apache-2.0
"""HTTP: OpenAI's API over a text service. Needs the extra `server`."""
