//! The private PostgreSQL: zero set-up, and nothing lost.
