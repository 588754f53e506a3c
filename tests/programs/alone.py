"""As if mpirun of another MPI library had started two processes: each finds itself alone."""

from mpi4py import MPI

from moecomm.transports.mpi import check_launch

check_launch(MPI.COMM_SELF.size, {"OMPI_COMM_WORLD_SIZE": "2"})
