//! Tiny models, goldens and closeness for tests.
