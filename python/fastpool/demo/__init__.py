"""`fastpool demo`: semantic search over real text with a real model, and what fastpool changes about it.

corpus finds the text, model turns it into token states, measure compares two ways of pooling the same states, search
looks answers up, report prints, run holds it all together. Needs the packages of `pip install "fastpool[demo]"`.
"""
