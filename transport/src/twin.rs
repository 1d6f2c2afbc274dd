//! The in-process twin of a transport: reads are copies, with faults to inject.
