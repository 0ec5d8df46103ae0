"""Encrypted linear heads: a client asks a model about a record without showing it, and the server needs no key.

    plan = plan_head(features=512, classes=10)               what it will be and cost, before anything runs
    head = EncryptedHead.load(plan, weights, bias, (-4, 4))   the server's side; refuses what would not come out exact
    key = QueryKey.fresh(head.public)                         the client's side; the secret never leaves it
    logits = key.decrypt(head.answer(key.encrypt(features)))

What this protects is the record and the logits, from the server and everybody between. It does not protect the weights
from who asks (guarantee G23): a head must be trained with differential privacy before it is published.
"""

from privacy.he.description import HeadDescription
from privacy.he.head import EncryptedHead
from privacy.he.key import QueryKey
from privacy.he.parameters import MOST_BITS, Parameters
from privacy.he.planner import HeadPlan, Packing, Prediction, Scheme, Wire, plan_head

__all__ = [
    "MOST_BITS",
    "EncryptedHead",
    "HeadDescription",
    "HeadPlan",
    "Packing",
    "Parameters",
    "Prediction",
    "QueryKey",
    "Scheme",
    "Wire",
    "plan_head",
]
