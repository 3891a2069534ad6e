"""Consuming from Redis without a moment in which a message is stored nowhere.

Kombu's consumer pops a message with ``BRPOP`` and records it as unacknowledged afterwards. If the
worker dies in between, the message is lost; and a worker without a free slot leaves a popped
message unread for as long as it is busy. Here a script does both in one step on the server. Lists,
hash and index are kombu's own, so that kombu still restores the messages of dead workers, and
workers without celery_eda can share the queues.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from queue import Empty
from time import monotonic, time
from typing import Any

from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis.exceptions import ConnectionError, ResponseError

from celery_eda.brokers.redis import replies
from celery_eda.brokers.redis.envelopes import list_of
from celery_eda.core.event import OF_ONE_WORKER
from celery_eda.errors import ConfigurationError

#: The list of payloads that are not messages, or that cannot be acknowledged or restored.
MALFORMED = "celery_eda.malformed"

#: Longest wait for a message of a lower priority, in seconds.
LOW_PRIORITY_POLL = 0.1
#: Seconds that a bell waits before it is renewed.
BELL = 5.0

# KEYS: unacknowledged messages, their index by time, the list of malformed payloads, and the lists
# to pop from in the order of preference. ARGV: the worker's time, in kombu's format, and the queue
# of each list. If the worker dies, the message returns to that queue, whatever exchange a forged
# message names.
#
# Lua cannot decode half of a surrogate pair, which Python can. It only has to find the tag, so
# it decodes the payload once more without such halves.
TAKE = """
local function decoded(payload)
  local ok, message = pcall(cjson.decode, payload)
  if ok then return ok, message end
  local cleaned = payload:gsub('\\\\\\\\', ''):gsub('\\\\u[dD][89a-fA-F]%x%x', '')
  return pcall(cjson.decode, cleaned)
end
for position = 4, #KEYS do
  while true do
    local payload = redis.call('RPOP', KEYS[position])
    if not payload then break end
    local ok, message = decoded(payload)
    local properties = ok and type(message) == 'table' and message.properties
    local info = type(properties) == 'table' and properties.delivery_info
    local tag = info and properties.delivery_tag
    local headers = ok and type(message) == 'table' and message.headers
    if type(tag) == 'string' and type(headers) == 'table' and headers[1] == nil then
      local queue = cjson.encode(ARGV[position - 2])
      redis.call('HSET', KEYS[1], tag, '[' .. payload .. ',"",' .. queue .. ']')
      redis.call('ZADD', KEYS[2], ARGV[1], tag)
      return {position - 4, payload, tag}
    end
    redis.call('LPUSH', KEYS[3], payload)
  end
end
return false
"""


# KEYS: unacknowledged messages, their index by time, the list of malformed payloads. ARGV: the
# delivery tag of the unreadable message, and its payload; without one, the recorded entry is moved.
SET_ASIDE = """
local noted = redis.call('HGET', KEYS[1], ARGV[1])
if noted then
  redis.call('LPUSH', KEYS[3], ARGV[2] ~= '' and ARGV[2] or noted)
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('ZREM', KEYS[2], ARGV[1])
end
return false
"""


class Unreadable(Exception):
    """The payload is JSON, but kombu cannot make a message of it."""


class Message(redis.Channel.Message):
    """Kombu's message; raises ``Unreadable`` if it cannot be made."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel=channel, **options)
        except Exception as error:
            raise Unreadable from error


class QoS(redis.QoS):
    """Kombu's QoS, which does not record again what the script has recorded."""

    def append(self, message: Any, delivery_tag: str) -> None:
        if delivery_tag == self.channel.taken:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        self._require_channel()
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self._require_channel()
        super().reject(delivery_tag, requeue)

    def restore_unacked(self, client: Any = None) -> None:
        # Celery closes a lost connection twice; the second time kombu has no client any more, and
        # the resulting error would end the worker. The messages are restored by other workers.
        if self.channel.connection.client is not None:
            super().restore_unacked(client)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        try:
            super().restore_by_tag(tag, client, leftmost)
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            # The worker of this unreadable message died before it could set the message aside.
            self.channel.set_aside(tag)

    def _require_channel(self) -> None:
        # On a closed channel kombu fails with an error for which Celery ends the worker. For a
        # ConnectionError Celery only logs it, and the message is redelivered.
        if self.channel.closed:
            raise ConnectionError("the connection of this message is lost")


class Bell:
    """A further connection of a channel, which waits for one more queue."""

    def __init__(self, queue: str, connection: Any) -> None:
        self.connection = connection
        self.kind = f"BELL {queue}"
        self.waits = False


class Poller(redis.MultiChannelPoller):
    """Kombu's poller, which serves bells even while no message may be consumed."""

    def on_readable(self, fileno: int) -> Any:
        if registered := self._fd_to_chan.get(fileno):
            channel, kind = registered
            if kind in channel.bells:
                return channel.handlers[kind]()
        return super().on_readable(fileno)


class Channel(redis.Channel):
    """Kombu's channel, which pops and records a message in one step.

    While the lists are empty it waits with ``BLMOVE`` from the end of one list to the same end:
    that changes nothing, and returns as soon as the list has a message. It waits for one list only,
    so each further queue has a bell, which waits likewise and then unblocks the channel.
    """

    QoS = QoS
    Message = Message
    #: Seconds for which one restoring worker excludes the others. A worker that loses its
    #: connection meanwhile excludes itself too, with kombu's 300 s for far too long. Two workers
    #: restoring at once do no harm: each message is restored in a transaction.
    unacked_mutex_expire = 5

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_cluster()
        self.taken: str | None = None
        self._without_ack: set[str] = set()
        self._asked: list[str] = []
        self._empty = False
        self.bells: dict[str, Bell] = {}
        self._known: Any = None
        self._client_id = 0

    def _refuse_cluster(self) -> None:
        with suppress(ResponseError):  # a user without the right to ask: kombu fails in its own way
            if self.client.info("cluster").get("cluster_enabled"):
                raise ConfigurationError(
                    "This Redis is a node of a Redis Cluster. Kombu's transport, and so Celery, "
                    "needs all keys on one server. Use a single Redis or Valkey, or several with "
                    "Sentinel (broker_url = 'sentinel://…')."
                )

    def _new_queue(self, queue: str, **options: Any) -> None:
        super()._new_queue(queue, **options)
        if queue.startswith(OF_ONE_WORKER):
            replies.mark(self.client, queue, (options["arguments"]["x-expires"]) / 1000)

    def basic_consume(self, queue: str, no_ack: bool = False, *args: Any, **kwargs: Any) -> Any:
        if no_ack:
            self._without_ack.add(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self._without_ack:
            super()._brpop_start(timeout)
        elif queues := self._queue_cycle.consume(len(self.active_queues)):
            self._in_poll = self.client.connection
            self._brpop_sent_at = monotonic()
            command = self._wait(queues) if self._empty else self._take(queues)
            self._in_poll.send_command(*command)

    def _brpop_read(self, **options: Any) -> Any:
        if self._without_ack:
            return super()._brpop_read(**options)
        try:
            try:
                reply = self.client.parse_response(self.client.connection, "EVAL", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
            waited, self._empty = self._empty, not (self._empty or reply)
            if waited or not reply:
                raise Empty
            self._deliver_taken(*reply)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _take(self, queues: list[str]) -> list[Any]:
        self._asked = [queue for _ in self.priority_steps for queue in queues]
        lists = [list_of(self, queue, pri) for pri in self.priority_steps for queue in queues]
        keys = [self.unacked_key, self.unacked_index_key, MALFORMED, *lists]
        prefixed = [self.global_keyprefix + key for key in keys]
        return ["EVAL", TAKE, len(keys), *prefixed, time(), *self._asked]

    def _wait(self, queues: list[str]) -> list[Any]:
        first, *others = queues
        self._queue_cycle.rotate(first)
        if others:
            self._ensure_client_id()
        for queue in others:
            self._ensure_bell(queue)
        return self._wait_at(first, LOW_PRIORITY_POLL)

    def _wait_at(self, queue: str, seconds: float) -> list[Any]:
        end = self.global_keyprefix + list_of(self, queue, self.priority_steps[0])
        return ["BLMOVE", end, end, "RIGHT", "RIGHT", seconds]

    # ── bells ───────────────────────────────────────────────────────────────────────────────

    def _ensure_client_id(self) -> None:
        """Ask the server for the client id of the waiting connection, once for each connection."""
        connection = self.client.connection
        if connection._sock is not self._known:
            connection.send_command("CLIENT", "ID")
            self._client_id = connection.read_response()
            self._known = connection._sock

    def _ensure_bell(self, queue: str) -> None:
        """Make a bell wait for *queue*, unless one does."""
        bell = self.bells.get(f"BELL {queue}")
        if bell is None:
            bell = Bell(queue, self.client.connection_pool.get_connection())
            self.bells[bell.kind] = bell
            self.handlers[bell.kind] = partial(self._on_bell, bell)
        cycle = self.connection.cycle
        if bell.connection._sock is None or (self, bell, bell.kind) not in cycle._chan_to_sock:
            bell.waits = False
            cycle._register(self, bell, bell.kind)
        if not bell.waits:
            bell.connection.send_command(*self._wait_at(queue, BELL))
            bell.waits = True

    def _on_bell(self, bell: Bell) -> None:
        """End the channel's wait if the queue of *bell* has a message."""
        bell.waits = False
        try:
            if bell.connection.read_response() is not None and self._in_poll:
                bell.connection.send_command("CLIENT", "UNBLOCK", self._client_id)
                bell.connection.read_response()
        except self.connection_errors:
            bell.connection.disconnect()

    def _poll_error(self, type: str, **options: Any) -> None:
        if type in self.bells:
            self.bells[type].connection.disconnect()
        else:
            super()._poll_error(type, **options)

    def _deliver_taken(self, position: int, payload: bytes, tag: bytes) -> None:
        queue = self._asked[position]
        self._queue_cycle.rotate(queue)
        try:
            message = loads(bytes_to_str(payload))
        except Exception:
            self.set_aside(tag, payload)
            return
        self.taken = bytes_to_str(tag)
        try:
            self.connection._deliver(message, queue)
        except Unreadable:
            self.set_aside(tag, payload)
        finally:
            self.taken = None

    def _do_restore_message(self, payload: Any, *arguments: Any) -> None:
        # Kombu drops a message that it cannot mark as redelivered. To Lua an empty list is a table.
        if payload["headers"] == []:
            payload["headers"] = {}
        super()._do_restore_message(payload, *arguments)

    def set_aside(self, tag: str | bytes, payload: bytes = b"") -> None:
        """Move the unacknowledged message *tag* to the malformed ones, as *payload* if given."""
        keys = [self.unacked_key, self.unacked_index_key, MALFORMED]
        prefixed = [self.global_keyprefix + key for key in keys]
        with self.conn_or_acquire() as client:
            client.eval(SET_ASIDE, len(keys), *prefixed, tag, payload)

    def malformed(self, limit: int) -> list[bytes]:
        with self.conn_or_acquire() as client:
            name = self.global_keyprefix + MALFORMED
            oldest: list[bytes] = client.lrange(name, -limit, -1)
        return oldest[::-1]

    def delete_malformed(self, payload: bytes) -> None:
        with self.conn_or_acquire() as client:
            client.lrem(self.global_keyprefix + MALFORMED, -1, payload)


class Transport(redis.Transport):
    """Kombu's transport, with the channel of this module."""

    Channel = Channel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()


class SentinelChannel(Channel, redis.SentinelChannel):
    """The same channel, to the master that Sentinel names."""


class SentinelTransport(Transport, redis.SentinelTransport):
    """The same transport, to the master that Sentinel names."""

    Channel = SentinelChannel
