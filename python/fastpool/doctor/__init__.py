"""`fastpool doctor`: measures which pooling a model wants, instead of trusting what its folder says.

pairs finds related and unrelated texts, embed runs the model over them once and pools with every mode, measure tells
how well each one separates the two, report prints and draws, run holds it all together. Of a SPLADE model logits are
pooled, to sparse vectors. Where states are not finite, finite says which, and trace what made them so. Needs the
packages of `pip install "fastpool[doctor]"`.
"""
