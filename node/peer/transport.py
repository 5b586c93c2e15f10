"""What both ends of the peer port agree on: the services' names, and the options of every connection."""

from __future__ import annotations

SERVICE = "weft.v1.Peer"
SIMILARITY = "weft.v1.SimilarityService"
MAX_MESSAGE = 4 << 20

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_metadata_size", 16 << 10),
    # The one option that was measured to help throughput.
    ("grpc.http2.write_buffer_size", 4 << 20),
    # No compression from anybody: the only bit set is "identity".
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # The default, 5 minutes, would make a server hang up on a client that pings as above.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)

SERVER_OPTIONS: tuple[tuple[str, int | str], ...] = (
    *OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 32),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 300_000),
    # A call that its caller neither reads nor cancels ends with its connection only: which takes no new calls
    # after its age, and is cut after the grace, which is long for what one call may ask for.
    ("grpc.max_connection_age_ms", 600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
)
