//! Bindings of UCX's UCP interface, opened at run time: the binary neither links UCX nor needs it to start.
