"""The session with a broker, from several threads at once."""

import queue
import threading
from collections.abc import Callable

from edge.session import Session

Broker = tuple[str, int]


def test_what_is_published_together_arrives_in_order_and_all_of_it(broker: Broker) -> None:
    """More than a socket takes at once, so that the listening thread must write the rest."""
    arrived: queue.Queue[tuple[str, bytes]] = queue.Queue()
    listener = Session(*broker, "listener", on_message=lambda *message: arrived.put(message))
    listener.subscribe("t/+")
    sender = Session(*broker, "sender")
    payloads = [n.to_bytes(2, "big") * 512 for n in range(8000)]  # 8 MB
    with sender.together():
        for payload in payloads:
            sender.publish("t/1", payload)
    assert sender.flush(60)
    assert [arrived.get(timeout=30)[1] for _ in payloads] == payloads
    sender.close()
    listener.close()


def test_threads_publish_at_once_and_nothing_is_torn(broker: Broker) -> None:
    arrived: queue.Queue[tuple[str, bytes]] = queue.Queue()
    listener = Session(*broker, "listener", on_message=lambda *message: arrived.put(message))
    listener.subscribe("t/+")
    sender = Session(*broker, "sender")

    def send(name: int) -> None:
        for n in range(300):
            sender.publish(f"t/{name}", n.to_bytes(2, "big") * (1 + n))

    threads = [threading.Thread(target=send, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got: dict[str, list[bytes]] = {}
    for _ in range(1200):
        topic, payload = arrived.get(timeout=30)
        got.setdefault(topic, []).append(payload)
    assert got == {f"t/{name}": [n.to_bytes(2, "big") * (1 + n) for n in range(300)] for name in range(4)}
    sender.close()
    listener.close()


def test_a_callback_may_wait_for_a_thread_that_uses_the_session(broker: Broker) -> None:
    """As the server's does, when more has arrived than it can write: it waits for the writer, who confirms messages."""
    room, waiting = threading.Semaphore(1), queue.SimpleQueue[Callable[[], None]]()

    def deliver(_topic: str, _payload: bytes, done: Callable[[], None]) -> None:
        room.acquire()
        waiting.put(done)

    session = Session(*broker, "server", on_delivery=deliver)
    session.subscribe("t/+")
    sender = Session(*broker, "sender")
    for _ in range(50):
        sender.publish("t/1", b"x")
    for _ in range(50):
        done = waiting.get(timeout=30)
        session.publish("u", b"while the callback waits")
        done()
        room.release()
    assert session.flush(30)
    sender.close()
    session.close()
