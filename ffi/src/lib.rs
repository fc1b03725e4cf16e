//! Place of the C ABI (`luna_broker.h`, opaque types, numbered errors). It exports nothing yet.
