"""Mixture of experts: feed-forward networks of which each token uses a few.

`layer`  all experts of a layer, as stacked matrices: the tokens sorted by expert, two grouped matrix products
`product`  such a product
"""

from stoker.parallel.experts.layer import Experts

__all__ = ["Experts"]
