"""One small adapter a peer library: a case's configuration in that library's own words, and nothing else.

Each module lists its providers in ``PROVIDERS`` and imports its library only inside ``build``. A peer that computed
something else would be a crippled baseline, so the tests compare values and gradients of every installed one.
"""
