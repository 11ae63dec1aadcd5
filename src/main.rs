//! Placeholder until the first whole thing stands.
fn main() {}
