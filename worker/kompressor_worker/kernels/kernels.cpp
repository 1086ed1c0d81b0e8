// One translation unit: what is in these files is compiled together, for this CPU.
#include "lanes.cpp"
#include "quantize.cpp"
#include "decode.cpp"
#include "column_loop.cpp"
#include "activations.cpp"
#include "butterflies.cpp"
#include "gram.cpp"
#include "encode.cpp"
