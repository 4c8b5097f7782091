# Fails when an object file built for one instruction set could lend its code to others.
#
#   cmake -DNM=nm -DISA=avx2 -DOBJECTS="a.o;b.o" -P check_isa.cmake
#
# The linker merges equal names: an inline function, say std::min<float>, that such a file leaves out of line may become
# the copy that the whole program uses, and then a machine without these instructions stops at it. So every symbol the
# file defines must either be local to it or have the name of the instruction set in it (namespace mmfast::...::avx2).
# Nothing may run at load time either, before the processor is known.
set(bad "")
foreach(object IN LISTS OBJECTS)
    execute_process(COMMAND ${NM} --defined-only ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
    if(failed)
        message(FATAL_ERROR "${NM} cannot read ${object}")
    endif()
    string(REPLACE "\n" ";" symbols "${symbols}")
    string(LENGTH "${ISA}" length)
    foreach(line IN LISTS symbols)
        if(line MATCHES "_GLOBAL__sub_I")
            list(APPEND bad "  ${line}  (runs at load time)")
        elseif(line MATCHES " [A-Zuvw] " AND NOT line MATCHES "${length}${ISA}")
            list(APPEND bad "  ${line}  (shared with other files)")
        endif()
    endforeach()
endforeach()
if(bad)
    list(JOIN bad "\n" bad)
    message(FATAL_ERROR "Objects built for ${ISA} define symbols they must not (see cmake/check_isa.cmake).\n"
        "Put templates and inline functions into an unnamed namespace inside the one of the instruction set, mark them "
        "MMFAST_INLINE, and keep the standard library's functions out:\n${bad}")
endif()
