print("nobody starts me: there is no file named bootstrap here")
