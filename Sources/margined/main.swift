print("margined")
