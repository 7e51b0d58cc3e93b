# Fails unless each symbol that the kernels of an instruction set share with other objects is in their own namespace.
# Otherwise the linker could keep one copy of an inline function, compiled for a processor that lacks the instructions
# of this copy. Run by CTest with NM, ISA and OBJECTS.
execute_process(COMMAND ${NM} --defined-only ${OBJECTS} OUTPUT_VARIABLE listing COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[0-9a-f]+ [A-Z] [^\n]+" symbols "${listing}")
# _ZN8selfattn<length><isa>...: nested names that begin with selfattn::<isa>, including guards and tables.
string(LENGTH "${ISA}" length)
set(others ${symbols})
list(FILTER others EXCLUDE REGEX " _Z[A-Za-z0-9_]*N[A-Za-z0-9_]*8selfattn${length}${ISA}")
if(NOT symbols MATCHES "kernels" OR others)
  message(FATAL_ERROR "symbols outside selfattn::${ISA}: ${others}")
endif()
