//! Running models with libtorch.
