from kompressor_worker.cli import main

main()
