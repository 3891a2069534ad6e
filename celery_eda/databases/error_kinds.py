"""Kinds of errors of a database: an outage, a lost race, a value that it refuses."""

from __future__ import annotations

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, DBAPIError, TimeoutError


class ErrorKinds:
    """Recognizes the errors of one database."""

    #: SQLSTATEs or error codes after which the same transaction may succeed if repeated.
    transient_codes: frozenset[object] = frozenset()

    #: Those that say that a value is at fault, beside :class:`sqlalchemy.exc.DataError`.
    value_codes: frozenset[object] = frozenset()

    def is_outage(self, error: BaseException) -> bool:
        """True if the database is away or takes no writes, through no fault of the statement."""
        return isinstance(error, DBAPIError) and error.connection_invalidated

    def ended_idle(self, error: BaseException) -> bool:
        """True if the database says that it ended the transaction because it was idle."""
        return False

    def takes_no_writes(self, error: DBAPIError) -> bool:
        """True if the server, or this connection to it, is read-only: a replica, say."""
        return False

    def is_aborted(self, connection: Connection) -> bool:
        """True if the transaction was aborted without an error: its COMMIT would roll back."""
        return False

    def is_transient(self, error: BaseException) -> bool:
        """True if the transaction lost a race, and may succeed when run again.

        The race was for a row lock, or for the last connection of the pool.
        """
        return isinstance(error, TimeoutError) or (
            isinstance(error, DBAPIError) and self.code_of(error) in self.transient_codes
        )

    def is_of_values(self, error: Exception) -> bool:
        """True if the statement failed because of a value: its size, its range, its characters."""
        of_values = (DataError, UnicodeError, OverflowError)
        return isinstance(error, of_values) or (
            isinstance(error, DBAPIError) and self.code_of(error) in self.value_codes
        )

    def code_of(self, error: DBAPIError) -> object:
        """The vendor's code of *error*."""
        raise NotImplementedError
