"""The one error tree of Tacit; every failure a person can act on is one of these.

    TacitError
    |-- PlanError        the plan or scenario cannot mean what it says       exit code 2
    |-- DataError        a data set cannot be read or breaks its schema      exit code 3
    |-- LedgerError      a ledger is damaged, foreign or out of step         exit code 4
    |-- BudgetExceeded   the next charge would cost more than is left        exit code 5
    |-- RunError         a run folder or engine cannot go on                 exit code 6
    |-- VaultError       a sealed file or a key file does not open           exit code 8
    |-- SealError        a message is not what its sender sealed             exit code 9
    |-- IdentityError    an invitation, key or certificate is refused        exit code 10
    `-- HeadError        an encrypted query, answer or head is refused       exit code 11

A message is one sentence: what was expected, what came, what to do. No message carries a private value, and no
error leaves a data holder (guarantee G12): the client application answers with a fixed word instead.
"""


class TacitError(Exception):
    """Root of all failures that a person can act on."""

    exit_code = 1


class PlanError(TacitError, ValueError):
    """The plan or scenario cannot mean what it says."""

    exit_code = 2


class DataError(TacitError):
    """A data set cannot be read, or breaks its schema."""

    exit_code = 3


class LedgerError(TacitError):
    """A ledger is damaged, foreign or out of step; it is never reset."""

    exit_code = 4


class BudgetExceeded(TacitError):  # noqa: N818 -- a decision of the holder, not a fault
    """The next charge would cost more than the holder's budget has left."""

    exit_code = 5


class RunError(TacitError):
    """A run folder or an engine cannot go on."""

    exit_code = 6


class VaultError(TacitError):
    """A sealed file, or a file of keys, does not open, or must not be written."""

    exit_code = 8


class SealError(TacitError):
    """A handshake or a sealed message is refused; a fixed sentence for each step, whatever was wrong with the bytes."""

    exit_code = 9


class IdentityError(TacitError):
    """An invitation, a key, a certificate or a list of members is not what it must be, or whoever shows it is not."""

    exit_code = 10


class HeadError(TacitError):
    """An encrypted query or answer is not what its key and head expect, or a head cannot be evaluated exactly."""

    exit_code = 11
