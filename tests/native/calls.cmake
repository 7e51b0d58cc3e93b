# Programs that drive whole calls without Python: for sanitizers, fuzzers and emulators.
add_library(selfattn_attend_case STATIC arrays.cpp attend_case.cpp)
target_link_libraries(selfattn_attend_case PUBLIC selfattn_core)
target_compile_options(selfattn_attend_case PRIVATE ${SELFATTN_WARNINGS})

add_executable(stress_threads stress_threads.cpp)
target_link_libraries(stress_threads PRIVATE selfattn_attend_case)
target_compile_options(stress_threads PRIVATE ${SELFATTN_WARNINGS})
add_test(NAME stress_threads COMMAND stress_threads 2)

# The fuzzer's target; `replay` runs it over a corpus without a fuzzer.
add_library(selfattn_fuzz_case STATIC fuzz_case.cpp definition.cpp)
target_link_libraries(selfattn_fuzz_case PUBLIC selfattn_attend_case)
target_compile_options(selfattn_fuzz_case PRIVATE ${SELFATTN_WARNINGS})
add_executable(replay replay.cpp fuzz_attend.cpp)
target_link_libraries(replay PRIVATE selfattn_fuzz_case)
target_compile_options(replay PRIVATE ${SELFATTN_WARNINGS})
add_test(NAME replay COMMAND replay ${CMAKE_CURRENT_SOURCE_DIR}/corpus)
if(SELFATTN_SANITIZE MATCHES "fuzzer-no-link")
  add_executable(fuzz_attend fuzz_attend.cpp)
  target_link_libraries(fuzz_attend PRIVATE selfattn_fuzz_case)
  target_link_options(fuzz_attend PRIVATE -fsanitize=fuzzer)
endif()
