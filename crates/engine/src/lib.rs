//! Generation: queue, slots, sampler, prefix reuse, constraints.
