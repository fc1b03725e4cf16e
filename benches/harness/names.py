"""Names of what is measured, as the tables print them."""

NO_SIZE = ""

FLOOR = "C and C, 64 bytes, one core"
REFERENCE = "Python on C server, in place"
REFERENCE_ONE_CORE = "Python on C server, in place, one core"
ONE_COPY = "Python on C server, one copy"
RAW = "raw bytes, Unix socket"
PIPE = "shared_memory + Pipe, in place"
PICKLE = "pickle over TCP"

LUNA_PING = "luna-broker, Python, ping, one core"
LUNA = "luna-broker, Python, in place"
LUNA_ONE_CORE = "luna-broker, Python, in place, one core"
LUNA_ONE_COPY = "luna-broker, Python, one copy"
LUNA_INLINE = "luna-broker, Python, inline rung"
RUST_PING = "luna-broker, Rust, ping, one core"
RUST = "luna-broker, Rust, in place"
RUST_ONE_CORE = "luna-broker, Rust, in place, one core"

# Rounds shuffle their units; a reader wants the same order every time.
IN_ORDER = (
    FLOOR,
    RUST_PING,
    LUNA_PING,
    REFERENCE,
    RUST,
    LUNA,
    PIPE,
    ONE_COPY,
    LUNA_ONE_COPY,
    RAW,
    LUNA_INLINE,
    PICKLE,
    REFERENCE_ONE_CORE,
    RUST_ONE_CORE,
    LUNA_ONE_CORE,
)
