// What this browser keeps: conversations and settings for good, the key as long as the tab.
export function read<T>(key: string, otherwise: T): T {
  try {
    const text = localStorage.getItem(key);
    return text === null ? otherwise : (JSON.parse(text) as T);
  } catch {
    return otherwise;
  }
}

// Tells whether there was room, and leave, to keep it.
export function write(key: string, value: unknown): boolean {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

let key = readKey();

function readKey(): string {
  try {
    return sessionStorage.getItem("vicuna-key") ?? "";
  } catch {
    return "";
  }
}

export const apiKey = (): string => key;

export function setApiKey(value: string): void {
  key = value.trim();
  try {
    sessionStorage.setItem("vicuna-key", key);
  } catch {
    // It is good until the page is loaded again.
  }
}
