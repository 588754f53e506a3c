"""Conformance suites: hand them your own Comm, AllToAll or Exchange.

    from moecomm import testing
    from moecomm.transports import threads

    testing.check_comm(threads.run)
    testing.check_all_to_all(threads.run, MyAllToAll)
    testing.check_exchange(threads.run, lambda comm, case: MyExchange(comm, case.num_experts))

The suites know what each rank must get, without asking the others.
"""

from moecomm.conformance.exchanges import ExchangeCase, check_exchange, check_exchange_on
from moecomm.conformance.moves import (
    Make,
    Run,
    check_all_to_all,
    check_all_to_all_on,
    check_comm,
    count_matrices,
    received_rows,
    sent_rows,
)

__all__ = [
    "ExchangeCase",
    "Make",
    "Run",
    "check_all_to_all",
    "check_all_to_all_on",
    "check_comm",
    "check_exchange",
    "check_exchange_on",
    "count_matrices",
    "received_rows",
    "sent_rows",
]
