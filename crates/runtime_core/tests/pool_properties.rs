//! The pool against a model made of maps, over random events on pools and tables small enough to run full.

#[path = "support/pool.rs"]
mod pool;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_pool_agrees_with_a_model_of_maps_whatever_happens(
        bytes in proptest::collection::vec(any::<u8>(), 0..800)
    ) {
        pool::run(&bytes);
    }
}
