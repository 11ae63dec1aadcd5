//! Coming up and going down.
