//! A secure multi-user todo back end.
