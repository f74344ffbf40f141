//! Learned, lock-free state and policies of agentrt: observe, score, predict, act.
#![allow(dead_code)]
pub mod kv;
