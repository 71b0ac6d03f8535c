//! Training, judging and shrinking: hours of work that resume to the bit.
